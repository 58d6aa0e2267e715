"""What the past predictions of a run say about its training data: `pskd inspect`.

Letters: N samples of the training split, B of a block, C classes, K listed samples.
"""
