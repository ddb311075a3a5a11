"""Readers of labelled files: tables, CoNLL, SQuAD, SWAG."""
