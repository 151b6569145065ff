"""Token shards on disk, and the order in which pretraining reads them."""
