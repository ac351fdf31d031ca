# The exact loss of the pretrained GPT-2 (124M parameters) on OpenWebText, by the windows of train.py; other sizes and
# texts by a flag.
#     pip install transformers
#     python eval.py config/eval_gpt2.py
#     python eval.py config/eval_gpt2.py --init_from=gpt2-xl --dataset=shakespeare   # or gpt2-medium, gpt2-large
# Not run: it needs GPT-2's weights from the Hugging Face hub.

init_from = 'gpt2'
dataset = 'openwebtext'
stride = 1024
