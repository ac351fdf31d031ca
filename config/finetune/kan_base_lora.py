# The hybrid of arXiv 2504.10490: the MLPs become KAN layers, and LoRA changes their base weights and splines.
#     python finetune.py config/finetune/sst.py config/finetune/kan_base_lora.py   # or another task

use_kan = True
use_lora = True
lora_kind = 'kan_base'
lora_targets = 'mlp'
