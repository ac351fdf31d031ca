# Adapters of two small KAN layers in a row, on the layers of attention and MLP.
#     python finetune.py config/finetune/sst.py config/finetune/kan_lora.py   # or another task

use_lora = True
lora_kind = 'kan'
lora_rank = 16
