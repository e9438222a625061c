# The benches in a container:
#   docker build -t lowbit .
#   docker run --rm --gpus all lowbit                                # pytest benches
#   docker run --rm --gpus all -v "$PWD/benches/baselines:/lowbit/benches/baselines" lowbit benches --benchmark-compare
# torch's wheels bring every CUDA library they need; of CUDA itself only the driver's hooks must be in the image.
FROM nvidia/cuda:13.0.2-base-ubuntu24.04

# Inductor and Triton compile C++ and C at run time, against Python's headers.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends g++ python3-dev python3-venv \
    && rm -rf /var/lib/apt/lists/*

ENV VIRTUAL_ENV=/opt/venv \
    PATH=/opt/venv/bin:$PATH \
    PIP_NO_CACHE_DIR=1 \
    PYTHONUNBUFFERED=1

# The layers of libraries change with the pins alone, not with the code. torch first and alone, as in tox.ini.
COPY .ci/constraints.txt /tmp/constraints.txt
RUN python3 -m venv "$VIRTUAL_ENV" && pip install --constraint /tmp/constraints.txt torch
RUN pip install --requirement /tmp/constraints.txt

WORKDIR /lowbit
COPY . .
RUN pip install --constraint /tmp/constraints.txt --editable . \
    && useradd --create-home lowbit \
    && chown --recursive lowbit: /lowbit
USER lowbit

ENTRYPOINT ["pytest"]
CMD ["benches"]
