# Shakespeare's sonnets, written on from their first three lines.
#     python finetune.py config/finetune/sonnets.py config/finetune/lora.py   # or another method

task = 'sonnets'
batch_size = 8
epochs = 15
