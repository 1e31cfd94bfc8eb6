"""The only place where a tolerance is written, each with what it bounds. Never widened."""

F32 = 1e-6  # elementwise float32 maths of a few operations
GRAD_F32 = 2e-6  # a gradient passes through about twice the operations
F64 = 1e-12  # Python floats: a few operations in double precision
TRANSFORMERS_LOGITS = 1e-4  # logits of order 4 against another framework, eight layers of float32
LOGP_GAP = 1e-5  # one log-prob by two graphs (decode with a cache, training forward) in float32
HIDDEN_F32 = 1e-5  # hidden states of order 1 after three layers, summed in another order
HIDDEN_GRAD_F32 = 2e-5  # their gradient, relative to the largest entry of the parameter's
BF16_LOGITS = 0.03  # mean error of logits of order 1: ten roundings to 2^-9 a layer, amplified
MODEL_GRAD = 2e-5  # a gradient of the whole tiny model, of order 1, summed in another order
GEMMA3_270M_LOGITS = 1e-3  # logits up to 33 against another framework, eighteen layers of float32
SAMPLED_LOGP = 5e-6  # a logit, score or log-prob up to 30 of a head of 64 terms, float32 throughout
KERNEL_LOGPS = 1e-5  # logits of order 10 and sums of thousands of exponentials, in float32
KERNEL_LOGPS_BF16 = 1e-4  # the same of a bfloat16 head: its products are exact, their sums float32
KEPT_MASS = 1e-6  # a sum of thousands of float32 masses, relative: which side of top-p it falls
LM_HEAD_LOGPS = 1e-5  # log-probs, logsumexps and entropies of order 10 from logits of order 10
LM_HEAD_GRAD = 1e-5  # gradients of order 1: sums over a few thousand words of softmax * embedding
SUM_OF_300 = 1e-5  # relative: 300 float32 terms, summed in another order, each with two exps
METRICS = dict(rtol=5e-5, atol=1e-6)  # of a few steps whose sums over rows were split otherwise
KERNEL_ATTENTION = 5e-6  # mixtures and gradients of order 1 to 10 of scores of order 1, float32
