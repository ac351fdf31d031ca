# LoRA, and graph attention behind the MLPs.
#     python finetune.py config/finetune/sst.py config/finetune/graph_lora.py   # or another task

use_lora = True
lora_kind = 'lora'
use_graph = True
