"""Networks: patches, encoder, decoder, tokenizer."""
