"""
Evaluate the pretrained gpt2-medium (350M parameters) on the data set at hand.

    pip install transformers
    python train.py config/eval_gpt2_medium.py --dataset=shakespeare

Not run here: it needs GPT-2's weights from the Hugging Face hub.
"""

init_from = 'gpt2-medium'
eval_only = True
eval_iters = 500  # use more batches to get a good estimate
batch_size = 8
