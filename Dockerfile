# The service with the built-in model, on a CPU:   docker build -t psunet-engine .
# on an NVIDIA GPU:                                docker build -t psunet-engine:cuda --build-arg DEVICE=cuda .
# Building needs a network, running does not.
FROM python:3.12.12-slim-bookworm

# cpu, or cuda: PyPI's torch includes CUDA; the host needs the driver and NVIDIA's container toolkit.
ARG DEVICE=cpu

# Triton's launchers, and on a CPU the blocks, are compiled where they run.
RUN apt-get update && apt-get install -y --no-install-recommends g++ && rm -rf /var/lib/apt/lists/*
RUN useradd --create-home --uid 1000 psunet

WORKDIR /src
COPY pyproject.toml setup.py README.md LICENSE ./
COPY kernels kernels
COPY engine engine
RUN if [ "$DEVICE" = cpu ]; then export PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu; fi && \
    pip install --no-cache-dir '.[serve]'

# OpenMP threads that spin slow the service down on shared cores; measured in benchmarks/NOTES.md.
ENV HF_HUB_OFFLINE=1 GOMP_SPINCOUNT=0 PYTHONUNBUFFERED=1 TRITON_CACHE_DIR=/home/psunet/.cache/triton
USER psunet
WORKDIR /home/psunet
EXPOSE 8000
STOPSIGNAL SIGTERM
HEALTHCHECK --interval=10s --timeout=5s --start-period=120s \
    CMD ["python", "-c", "import urllib.request as r; r.urlopen('http://127.0.0.1:8000/health', timeout=4)"]
# On SIGTERM it finishes running requests for up to --drain seconds; give docker stop more (--time 40).
ENTRYPOINT ["python", "-m", "engine.serve"]
CMD ["--host", "0.0.0.0", "--port", "8000", "--drain", "30"]
