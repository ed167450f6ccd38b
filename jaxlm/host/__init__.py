"""What a command needs of its machine and terminal; nothing here knows of training."""
