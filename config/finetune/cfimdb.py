"""
The sentiment of film reviews in two classes (CFIMDB). Reviews are long, so batches are accumulated.

    python finetune.py config/finetune/cfimdb.py config/finetune/lora.py   # or another method

Not run here with GPT-2, whose weights come from the Hugging Face hub; --init_from=out-taskmix takes the small GPT of
config/train_taskmix.py.
"""

task = 'cfimdb'
batch_size = 8
gradient_accumulation_steps = 4
