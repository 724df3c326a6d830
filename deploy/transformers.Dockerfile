# `transformers serve` for docker-compose.yml, since no image of it is published. Runs on the GPU, or without one on the CPU.
FROM python:3.11.14-slim-bookworm
WORKDIR /opt/transformers
COPY servers/transformers.txt pins.txt
# The list names torch's CPU build; the wheel of the same version without that suffix has CUDA.
RUN sed -i 's/+cpu$//' pins.txt && \
    pip install --no-cache-dir --constraint pins.txt torch 'transformers[serving]' accelerate
COPY twoclocks/engines/transformers_serve.py serve.py
ENTRYPOINT ["python3", "/opt/transformers/serve.py"]
