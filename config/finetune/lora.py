# LoRA of rank 32 on the layers of attention and MLP.
#     python finetune.py config/finetune/sst.py config/finetune/lora.py   # or another task

use_lora = True
lora_kind = 'lora'
