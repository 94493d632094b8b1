"""What tools return: records, labels, terms, the k largest, tables."""
