"""Readers of labelled files: tables, CoNLL, SQuAD and SWAG."""
