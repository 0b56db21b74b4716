"""The order of an epoch, the loader of its batches, and the handling of bad samples."""
