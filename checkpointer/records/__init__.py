"""What a checkpoint leaves behind: records as values, as JSON, and folded into a manifest."""
