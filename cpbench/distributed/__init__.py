"""Process groups and collectives. Nothing outside this package calls torch.distributed."""
