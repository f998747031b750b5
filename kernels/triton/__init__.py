"""GPU kernels in Triton.

A module here imports `triton`, torch and its neighbours, nothing else of tcompress: the ops above check the arguments
and know the references. Importing this package imports nothing, so that it is there without Triton too.

    bindings             the ops: what the kernels take of them, and their arguments; imports the others when they run
    bindings_sparse      the same of the ops of sparse weights
    kernel_binding       what the two share
    bindings_int4        the same for weights of 4 bits
    reasons              limits of the kernels, and what is said where they do not hold
    numbers              rounding and scales, as the references of the ops define them
    tiles                the sizes of a launch: tables by kernel and GPU
    autotune             which sizes: measured once on a GPU, then from a file
    quantize_tokens      float rows -> integers, one scale a row
    quantize_norm        the same of what RMSNorm or LayerNorm gives
    quantize_rotary      the same of queries or keys after rotary embedding
    attention_prepare    mean of K; integers of Q and K
    attention_blocks     the softmax over blocks of keys
    attention            the fused kernel and its launch: masks, windows, softcap
    attention_tiles      tiles by head size and GPU
    decode               few queries over the int8 cache, the tokens split over programs
    linear_finish        scales, bias, activation, residual, one rounding
    linear_wide          int8, many tokens: tiles of tokens x channels
    linear_narrow        int8, few tokens: a slice of the weight per program, K split over programs
    linear               int8: which of the two, and their launch
    linear_quantized     int8: the launch for activations in integers
    linear_tiles         int8: tiles by tokens and GPU
    split_k              a sum over K by several programs, in a fixed order
    int4_blocks          nibbles -> integers or floats
    int4_wide            int4, many tokens
    int4_narrow          int4, few tokens
    int4_linear          int4: which of the two, and their launch; W4A8 and W4A16
    sparse_layout        sparse weights as the kernels read them; plain torch
    int4_sparse_layout   the same of 4 bits
    int4_dequantize      int4, many tokens in floats: the weight to floats once, for torch's product
    int4_tiles           int4: tiles by tokens, group and type
    int4_linear          int4: which of the three, and their launch; W4A8 and W4A16
    block_panels         which blocks of a sparse weight are kept; activations in panels
    block_sparse_linear  int8 and float weights of which whole blocks are zero
    block_sparse_narrow  few tokens times such a weight, 4 bits too
    int4_sparse_linear   4-bit weights of which whole blocks are zero
    two_four_linear      2:4 weights, int8 and float
"""
