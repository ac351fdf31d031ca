"""
Adapters of two small KAN layers in a row, on the layers of attention and MLP.

    python finetune.py config/finetune/sst.py config/finetune/kan_lora.py   # or another task

The learning rate is a guess to start from.
"""

use_lora = True
lora_kind = 'kan'
lora_rank = 16
