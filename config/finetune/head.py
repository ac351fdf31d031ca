# Only the layer that reads the answer off trains.
#     python finetune.py config/finetune/sst.py config/finetune/head.py   # or another task

finetune_mode = 'head'
use_lora = False
