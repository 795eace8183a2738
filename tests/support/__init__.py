"""What tests share: helpers, programs that are killed, and real servers."""
