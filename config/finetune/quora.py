"""
Whether two questions are the same (Quora).

    python finetune.py config/finetune/quora.py config/finetune/lora.py   # or another method

Not run here with GPT-2, whose weights come from the Hugging Face hub; --init_from=out-taskmix takes the small GPT of
config/train_taskmix.py.
"""

task = 'quora'
epochs = 5
