"""Evaluation: is an attribution right?"""
