"""Pure tensor maths: tensors and hyper-parameters in, tensors out. Needs torch alone.

B sequences, P prompt tokens, T response tokens, K members, V vocabulary, N tokens, D hidden width.
Quantities that span processes take `all_sum`, which adds a tensor up over all of them.
"""
