# All weights train.
#     python finetune.py config/finetune/sst.py config/finetune/full.py   # or another task

finetune_mode = 'full'
use_lora = False
learning_rate = 2e-5
