"""How a checkpoint becomes durable: the transaction, the records on the storage, aliases, and recovery."""
