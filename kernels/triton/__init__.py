"""GPU kernels in Triton.

A module here imports `triton`, torch and its neighbours, nothing else of tcompress: the ops above check the arguments
and know the references. Importing this package imports nothing, so that it is there without Triton too.

    bindings             the ops: what the kernels take of them, and their arguments; imports the others when they run
    numbers              rounding and scales, as the references of the ops define them
    quantize_tokens      float rows -> integers, one scale a row
    attention_prepare    mean of K; integers of Q and K
    attention_blocks     the softmax over blocks of keys
    attention            the fused kernel and its launch
    attention_tiles      tile sizes by head size and GPU
    linear_finish        scales, bias, activation, residual, one rounding
    linear_wide          many tokens: tiles of tokens x channels
    linear_narrow        few tokens: a slice of the weight per program, K split over programs
    linear               which of the two, and their launch
    linear_quantized     the launch for activations in integers
    linear_tiles         tile sizes by tokens and GPU
"""
