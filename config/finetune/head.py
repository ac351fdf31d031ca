"""
Only the layer that reads the answer off trains.

    python finetune.py config/finetune/sst.py config/finetune/head.py   # or another task

The learning rate is a guess to start from.
"""

finetune_mode = 'head'
use_lora = False
