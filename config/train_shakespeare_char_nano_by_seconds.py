# The vanilla GPT that costs what the KAN-GPT of train_shakespeare_char_nano_kan.py costs: 193 ms per step, 1.018
# times as long, on Intel(R) Xeon(R) Processor, 2 threads, float32 (no record).
#     python train.py config/train_shakespeare_char_nano_by_seconds.py
# Found by `python study/balance.py config/train_shakespeare_char_nano_kan.py --by=seconds`; learning rate and initial
# scale are those of nano_balanced.
# Measured over five seeds (results/nano): validation loss 1.697 ± 0.010, 5.3 minutes of training steps on one core of
# a Xeon (AMX; torch 2.13, float32).

include = 'train_shakespeare_char_nano.py'
out_dir = 'out-shakespeare-char-nano-by-seconds'
n_layer = 17
