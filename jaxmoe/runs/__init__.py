"""What a training run left on disk: read, listed, and drawn as a page, alone or beside others."""
