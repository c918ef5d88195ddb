"""Hand-made answers for the screens: every number is chosen, so a screen changes only when its code does."""

from __future__ import annotations

from msgspec.structs import replace

from planner.machine import machine_from_gpus
from planner.survey import Answer, Survey, Target
from planner.types import (
    Candidate,
    Disk,
    DiskEstimate,
    Estimate,
    Gpu,
    GpuEstimate,
    GpuProcess,
    Host,
    HostEstimate,
    Machine,
    MemoryLine,
    ModelRef,
    Plan,
    PlanModel,
    Range,
    Rejected,
    Speed,
    Stack,
    Strategy,
    Verdict,
    Workload,
)
from planner.units import GIB
from profiles.catalogue import load_model
from profiles.hardware import load_gpu

MODEL = load_model("qwen2.5-7b")
STACK = Stack("2.11", "5.17", "0.50", "0.21")
INFER, TRAIN = Workload(), Workload(task="train")
NF4 = Strategy(quant="nf4")
QLORA = Strategy(quant="nf4", optimizer="paged_adamw_8bit")
HOST = Host(ram_total_bytes=64 * GIB, ram_available_bytes=60 * GIB)


def gpu_estimate(gib: float) -> GpuEstimate:
    process = int(gib * GIB)
    lines = (
        MemoryLine("weights", int(5.18 * GIB), "28 layers + embeddings + head, nf4", "counted"),
        MemoryLine("logits and loss", int(3.4 * GIB), "2048 tokens x 152064 vocabulary x 12 B", "modelled"),
        MemoryLine("library workspace", GIB // 64, "cuBLAS", "measured"),
    )
    return GpuEstimate(
        index=0,
        budget_bytes=int(23.5 * GIB),
        budget_basis="nvidia-smi total 24 GiB, minus 512 MiB for the display",
        load_bytes=int(5.18 * GIB),
        allocated_peak_bytes=sum(line.bytes for line in lines),
        required_bytes=process - GIB // 2,
        context_bytes=GIB // 2,
        process_bytes=process,
        low_bytes=int(0.95 * process),
        high_bytes=int(1.08 * process),
        managed_bytes=GIB // 50,
        peak_moment="loss",
        components=lines,
        moments={"load": int(5.3 * GIB), "loss": int(8.6 * GIB), "optimizer_step": int(5.4 * GIB)},
    )


def estimate(
    gib: float | None, verdict: Verdict, tokens_per_s: float | None, *, train: bool = False
) -> Estimate:
    speed = Speed()
    if tokens_per_s is not None:
        known = Range(tokens_per_s / 2, tokens_per_s, 2 * tokens_per_s)
        speed = (
            Speed(train_tokens_per_s=known)
            if train
            else Speed(decode_tokens_per_s=known, bound="memory bandwidth")
        )
    ram = MemoryLine("process", int(2.5 * GIB), "Python, torch and libraries", "measured")
    download = MemoryLine("download", int(14.2 * GIB), "7,615,616,512 parameters x 2 B", "counted")
    return Estimate(
        model=ModelRef(MODEL.id, MODEL.parameters),
        stack=STACK,
        gpus=() if gib is None else (gpu_estimate(gib),),
        host=HostEstimate(ram_bytes=ram.bytes, components=(ram,)),
        disk=DiskEstimate(components=(download,)),
        speed=speed,
        verdict=verdict,
        reasons=("card 0 needs what it needs, has 23.50 GiB: some of it to spare, as this line says",),
        defaulted=("layer_types",),
    )


def answers() -> tuple[Answer, ...]:
    """One answer of every kind."""

    def row(
        job: str, label: str, verdict: Verdict, gib: float, speed: float | None, **more: object
    ) -> Answer:
        train = label.startswith("train")
        plain = Answer(
            job=job,
            label=label,
            verdict=verdict,
            workload=TRAIN if train else INFER,
            strategy=QLORA if train else NF4,
            estimate=estimate(gib, verdict, speed, train=train),
        )
        return replace(plain, **more)

    offloaded = Strategy(placement="mixed_offload", engine="accelerate")
    return (
        row(
            "bf16",
            "run in bf16",
            "fits",
            9.6,
            0.42,
            strategy=offloaded,
            reason="with 9 of 28 layers in RAM",
            longest_context_tokens=19456,
            largest_batch_size=18,
        ),
        row("int8", "run in int8", "unknown", 16.8, None),
        row("nf4", "run in NF4", "fits", 6.1, 31.4, longest_context_tokens=131072, largest_batch_size=70),
        row("qlora", "train QLoRA", "tight", 23.1, 832.2, longest_context_tokens=448),
        Answer(
            job="lora",
            label="train LoRA",
            verdict="not_possible",
            workload=TRAIN,
            reason="the card has no bf16: it takes compute capability 8.0",
        ),
        row("full", "train full", "does_not_fit", 158.3, 20.0, reason="at least 29.6 GiB, with fused loss"),
    )


def survey(*targets: Target) -> Survey:
    cards = {"nf4": ("rtx-4060-8gb", "rtx-5060-8gb"), "full": ()}
    return Survey(
        model=MODEL, workloads={"infer": INFER, "train": TRAIN}, targets=targets, smallest_cards=cards
    )


def on_card(name: str) -> Target:
    machine = machine_from_gpus([(load_gpu(name), 1)], ram_bytes=64 * GIB)
    return Target(name=name, machine=machine, answers=answers())


def without_card() -> Target:
    need = estimate(9.9, "fits", None)
    rows = (
        Answer(
            job="nf4",
            label="run in NF4",
            verdict="fits",
            workload=INFER,
            strategy=Strategy(placement="cpu"),
            estimate=estimate(None, "fits", 0.18),
            need=need,
        ),
        Answer(
            job="qlora",
            label="train QLoRA",
            verdict="does_not_fit",
            workload=TRAIN,
            strategy=Strategy(placement="cpu"),
            estimate=estimate(None, "does_not_fit", 3.1),
            need=need,
        ),
    )
    return Target(name="here", machine=Machine(origin="live", host=HOST), answers=rows)


def plan() -> Plan:
    fits = estimate(9.9, "fits", 832.2, train=True)
    best = Candidate(
        rank=1,
        strategy=QLORA,
        engine="resident",
        device_map={"": 0},
        estimate=fits,
        speed=fits.speed,
        reasons=(
            "fits: 9.90 GiB of 23.50 GiB on card 0",
            "adapters make up for the quantized weights under them",
        ),
    )
    lost = tuple(
        Rejected(
            strategy=replace(QLORA, placement=place),
            reason="training is not offloaded",
            needs="a card",
        )
        for place in ("mixed_offload", "disk_offload")
    )
    return Plan(
        model=PlanModel(id=MODEL.id, parameters=MODEL.parameters),
        stack=STACK,
        machine=machine_from_gpus([(load_gpu("rtx-3090"), 2)]),
        workload=TRAIN,
        candidates=(best,),
        rejected=lost,
    )


def live_machine() -> Machine:
    card = Gpu(
        index=0,
        profile=load_gpu("rtx-3090"),
        total_bytes=24 * GIB,
        free_bytes=20 * GIB,
        reserve_bytes=GIB // 2,
        pcie_generation=1,
        pcie_generation_max=4,
        pcie_lanes=8,
        pcie_lanes_max=16,
        power_limit_watts=300,
        driver="580.65",
        processes=(GpuProcess(4711, "Xorg\u202e", GIB // 4), GpuProcess(1, None, None)),
    )
    host = Host(
        ram_total_bytes=64 * GIB,
        ram_available_bytes=60 * GIB,
        swap_total_bytes=8 * GIB,
        swap_free_bytes=7 * GIB,
        locked_limit_bytes=8 * 2**20,
        cpu="A CPU",
        cores=16,
        system="Linux",
    )
    disks = (Disk(path="/", total_bytes=900 * GIB, free_bytes=99 * GIB, kind="nvme"),)
    return Machine(
        origin="live", gpus=(card,), host=host, disks=disks, notes=("one thing could not be read",)
    )
