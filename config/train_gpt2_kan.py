# GPT-2's shape on OpenWebText with KAN layers in the MLPs, their hidden layer narrowed to 0.4 n_embd: 123.55M
# parameters, as many as the 123.59M of train_gpt2.py.
#     torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_kan.py
# Not run: it needs several GPUs for days.

include = 'train_gpt2.py'
out_dir = 'out-gpt2-kan'
use_kan = True
kan_hidden = 0.4  # an edge holds 10 numbers (base, 8 splines, scaler) in place of 1, hence a tenth of the MLP's 4
