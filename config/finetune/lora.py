"""
LoRA of rank 32 on the layers of attention and MLP.

    python finetune.py config/finetune/sst.py config/finetune/lora.py   # or another task

The learning rate is a guess to start from.
"""

use_lora = True
lora_kind = 'lora'
