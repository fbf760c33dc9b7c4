"""How the bundled reference model is made: a small Llama that can retrieve from its whole context.

Measuring KV-cache compression offline needs a model that really uses its long context, small enough for a CPU.
Such a model does not come from plain language modelling: at a few million parameters retrieval appears only with a
start near an induction circuit, documents made of questions, and lengths that grow. The price is that the model
knows nothing about the world. Read the tree in the order of the data:

    recipe.py       what defines a run; the limits it must keep
    corpus.py       books and word lists, some of each held out of training
    tokenizer.py    byte-level BPE in which every digit is a token
    tasks/          documents whose answers are in the text: one file per kind of question
    batches.py      documents to rows of tokens, loss weights and positions
    model.py        the Llama, its loss, and the attention used while training
    mimetic.py      the start near an induction circuit
    schedule.py     stages of growing length, learning rate, budget
    optim.py        Muon and AdamW
    feed.py         the loader, made anew as progress changes what it draws
    train.py        the loop; journal.py is what it says meanwhile
    checkpoint.py   saving and going on after an interrupt
    measure.py      is an answer right, how well is a book predicted
    evaluate.py     the table of the model card
    export.py       the folder that from_pretrained loads; card.py writes its README.md
    spectra.py      how many channels the K and V projections really use
    __main__.py     the one command that does all of it
"""
