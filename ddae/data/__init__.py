"""From shards to batches: order, crops, masks, decoding, loading."""
