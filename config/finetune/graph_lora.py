"""
LoRA, and graph attention behind the MLPs.

    python finetune.py config/finetune/sst.py config/finetune/graph_lora.py   # or another task

The learning rate is a guess to start from.
"""

use_lora = True
lora_kind = 'lora'
use_graph = True
