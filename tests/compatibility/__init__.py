"""The compatibility matrix: what routing must hold together with, one file for each group of rows."""
