"""
The sentiment of film reviews in five classes (Stanford Sentiment Treebank).

    python finetune.py config/finetune/sst.py config/finetune/lora.py   # or another method

Not run here with GPT-2, whose weights come from the Hugging Face hub; --init_from=out-taskmix takes the small GPT of
config/train_taskmix.py.
"""

task = 'sst'
