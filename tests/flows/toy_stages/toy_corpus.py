from lilpipe.config.corpus import CorpusConfig
from lilpipe.stage import Stage


def run(config, inputs, workspace):
    (workspace.output / "documents.txt").write_text(f"{config.min_chars} characters at least\n")
    workspace.report.mkdir(exist_ok=True)
    (workspace.report / "report.html").write_text("<h1>The corpus report</h1>")
    workspace.progress(1, 1, unit="documents")
    return {"num_documents": 1.0}


STAGE = Stage("corpus", "Corpus", CorpusConfig, run, main_metric="num_documents")
