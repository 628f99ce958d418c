"""Data loading: shards, sample order, crops, masks, decoding, batches."""
