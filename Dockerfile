# hft on GPUs, from a checkout. We have not built it.
#
#   docker build --tag hft .
#   docker run --rm --gpus all --ipc host --volume "$PWD/runs:/hft/runs" hft make sft-hft
#   docker run --rm --gpus all --ipc host --volume "$PWD/results:/hft/results" hft make gpu-check
FROM nvidia/cuda:12.8.1-base-ubuntu24.04

# A compiler and Python's headers are for torch.compile and triton.
RUN apt-get update \
 && apt-get install --yes --no-install-recommends g++ make python3-dev python3-venv \
 && rm -rf /var/lib/apt/lists/*

WORKDIR /hft
# First what `make install` reads, so that other changes install nothing again.
COPY Makefile pyproject.toml setup.py constraints.txt README.md LICENSE ./
COPY hft hft
COPY recipes recipes
RUN make install

COPY . .
ENV PATH=/hft/.venv/bin:$PATH
CMD ["bash"]
