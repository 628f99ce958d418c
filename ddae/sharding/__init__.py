"""From archives of images to shards: reading, checking and converting images, writing."""
