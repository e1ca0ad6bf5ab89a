"""Core parameter isolation (CPI-FT, arXiv 2508.21741): four stages, each a function over folders."""
