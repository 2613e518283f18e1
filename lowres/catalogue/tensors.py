"""The kinds of tensors in a model; see `lowres.storage.specs`."""

# the matrices of the blocks, embedding and head, and small tensors that are always fp32
MATRIX, EMBEDDING, NORM, BIAS, ADAPTER = "matrix", "embedding", "norm", "bias", "adapter"
# what an optimizer may update
ONLY_MATRICES, WITHOUT_NORMS, EVERYTHING = (MATRIX,), (MATRIX, EMBEDDING), (MATRIX, EMBEDDING, NORM)
