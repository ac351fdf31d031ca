"""
Shakespeare's sonnets, written on from their first three lines.

    python finetune.py config/finetune/sonnets.py config/finetune/lora.py   # or another method

Not run here with GPT-2, whose weights come from the Hugging Face hub; --init_from=out-taskmix takes the small GPT of
config/train_taskmix.py.
"""

task = 'sonnets'
batch_size = 8
epochs = 15
