# The vanilla GPT in nano size with graph attention behind its MLPs, 0.25M parameters.
#     python train.py config/train_shakespeare_char_nano_graph.py
# Needs torch-geometric (requirements-all.txt). Measured over three seeds (1, 2, 3): validation loss 1.715 ± 0.004,
# 1.9 minutes of training steps on one core of an AMD EPYC without AMX (torch 2.13, float32). No more than a hint
# beside nano's 1.722 ± 0.009: the learning rate and init_std are nano's, and the model is larger.

include = 'train_shakespeare_char_nano.py'
out_dir = 'out-shakespeare-char-nano-graph'
use_graph = True
