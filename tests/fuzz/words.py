"""Values for the options of command lines, most of them wrong. M, B, T, A, P, C stand for folders (commands.World)."""

from tests.fuzz import world

LONG = "x" * 300
NUMBERS = ["", " 7", "9" * 5000, str(2**31), str(2**63), "\u0664"]
NUMBERS += "0 -1 1 2 3 0.5 1e400 nan inf -inf abc 1e9 0x10 1_0 True None -0.0 1e-320".split()
TEXTS = ["", " ", "a\nb", "\udcff", "\U0001f600", LONG, "\x1b[31m"]
TEXTS += ", ,, [bold]x[/bold] [/] :smile: -- - %s {}".split()

METHODS = """
cskv rtn rtn:bits=4 cskv:keep=0.5,bits=4,window=16 streaming_llm kivi spectral:budget=0.3 full zeros nope cskvv
cskv:kep=1
cskv:codec=4 cskv:codec=True cskv:codec='rtn cskv:keep=(0.5 cskv:keep=[[1]] cskv:keep=nan cskv:keep=inf cskv:keep=1e-300
cskv: cskv:= cskv:=3 cskv:keep cskv:keep= cskv:,, : :keep=1 cskv:steps=-1 cskv:init=7 cskv:lr=nan,steps=1 cskv:rank=b'x'
cskv:group_heads=... cskv:widths=(1,2) spectral:widths=[1,2,4]
rtn:bits=four rtn:bits=2.0 rtn:bits=1e400 rtn:bits=4,bits=4
rtn:group=0 rtn:window=-1 rtn:window=1e9 rtn:window=4611686018427387904 rtn:sinks=\u0663 streaming_llm:sinks=1e9
streaming_llm:like=cskv streaming_llm:like= streaming_llm:like=nope
""".split()
METHODS += ["cskv:codec={'a': 1}", "cskv:keep=" + "-" * 9000 + "1", "(" * 9000, "cskv:keep=" + "-" * 100_000]

TASKS = """
passkey passkey:tokens=200 passkey:filler=noise,tokens=1000000000000 passkey:path=3 passkey:path=/dev/zero
passkey:wording=x passkey:path=T/short.txt passkey:path=T/wide.txt passkey:path=T/pipe passkey:count=3 passkey:seed=3
passkey:n=3 passkey:lines longeval:lines=4 longeval:official=False,lines=3 longeval:lines=0 longeval:lines=1.5
longeval:lines=None longeval:official=3 longeval:path=T/rows.jsonl longeval_topics:path=T/deep.json needle:depth=0.5
needle:depth=nan needle:depth='x' copy nope : kv_retrieval scbench_like:turns=2 scbench_like:turns=100000000
scbench_like:turns=True graphwalks:hops=9 babi_books:story=qa9 ruler:task=3 ruler:task=vt
ruler:task=qa_1,path=T/deep.json longbench longbench:path=T/rows.jsonl longbench_v2:path=T/choices.jsonl
babilong:path=T loogle:path=T/rows.jsonl scbench:path=T/rows.jsonl lveval:path=T/deep.json
""".split()
TASKS.append("")

PLACES = ["o[x] :smile:", "a\nb", LONG, ""]
PLACES += "out new/deep/out . .. out.png P.txt link P/full P.txt/x /proc/kvshrink /dev/null /dev/full used".split()
PICTURES = [LONG + ".png", "", "[b] $x_$.png"]
PICTURES += "p.png p.svg p p.PNG p.jpeg2 d.png link.png .png P.txt /dev/null new/p.png P/full".split()
READ = "good bracket[0] latin wide wide_bare empty blank short mark".split()
READ = [f"T/{name}.txt" for name in READ] + [
    "T/binary",
    "T/pipe",
    "T/page.md",
    "T",
    "/dev/null",
    "/dev/zero",
    "no",
    "",
    LONG,
]

# options that make each command quick
QUICK = {
    "fit": "--text T/good.txt --length 128 --out out",
    "generate": "--prompt One_day_in_spring --max-new-tokens 2 --method rtn",
    "inspect": "--out p.png",
    "plan": "--text T/good.txt --length 256 --tokens 300 --trials 1 --methods rtn --byte-ratio 0.4",
    "eval": "--task passkey --tokens 200 --cases 1 --method rtn",
    "eval perplexity": "--prefix 100 --scored 4 --documents 1 --method rtn",
    "eval suite": "--methods rtn --byte-ratio 0.5 --tasks copy --lengths 200 --cases 1 --documents 0",
    "demo": "--cases 0",
    "report": "",
    "lm-eval": "",
}
SELDOM = {"demo": 1, "lm-eval": 1, "eval suite": 4, "report": 4}  # of 10
VALUES = {
    "--model": ["M", *(f"B/{name}" for name in world.BROKEN), "T/good.txt", "nope/none", "./nowhere", "", "~"],
    "--artifact": ["A", "P", "nowhere", "T/good.txt", "", "A/kvshrink.json", "C"],
    "--plan": ["plan.json", "P.txt", "A/kvshrink.json", "T/deep.json", "nowhere"],
    "--method": METHODS,
    "--methods": [*METHODS, "", *"cskv,rtn , rtn,rtn cskv,".split()],
    "--task": TASKS,
    "--tasks": ["", *"copy passkey,copy , nope ruler/vt copy,copy".split()],
    "--stored": "longbench:path=T/rows.jsonl longbench nope babilong:path=nowhere scbench:path=T,subset=[1]".split(),
    "--modes": ["", *"agnostic aware multi_turn agnostic,agnostic twice ,".split()],
    "--mode": "agnostic aware multi_turn decode chunked prefix_compressed simulated x".split(),
    "--lengths": ["", "9" * 5000, *"200 0 -1 200,200 99999 16 x 1e9".split()],
    "--only": ["", *"split nope , split,split".split()],
    "--memory": ["20 GiB", "5 apples", "9" * 400, "1" * 400 + "GiB", *"64KiB 200KiB -1 nanGiB 0 1e5 \u0664MiB".split()],
    "--prompt": ["One day", *TEXTS, "word " * 600],
    "--out": PLACES,
    "--work": PLACES,
    "--leaderboard": ["T/page.md", *PLACES],
    "--picture": PICTURES,
    "--log-with": ["tensorboard", "x", ""],
    **dict.fromkeys(("--text", "--prompt-file", "--on"), READ),
}
FLAGS = ("--json", "--help")
COUNTS = (
    "--max-new-tokens --length --batch --tokens --trials --seed --cases --documents --scored --prefix --chunk".split()
)
COUNTS += "--trajectory --steps --keep --bits --byte-ratio --kl".split()
OPTIONS = [*VALUES, *COUNTS, "--json", "--help", "--nonsense"]

REPORTED = ["P", "P/full", "nowhere", "A", "P.txt", "", "T/pipe", "T/page.md"]
HARNESS = ["nope", "ls x", "run --nope", "--model"]
SLOW = ["--model kvshrink", "run --tasks nope", "run --model_args method=cskv:keep=3 --tasks x"]  # reads all tasks
