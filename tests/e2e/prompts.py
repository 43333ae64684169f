"""Real prompts of 1 to 4,000 tokens, in several languages, with shared prefixes."""

_STORY = (
    "Call me Ishmael. Some years ago, never mind how long precisely, having little or no money in my purse, and "
    "nothing particular to interest me on shore, I thought I would sail about a little and see the watery part of the "
    "world. It is a way I have of driving off the spleen and regulating the circulation. "
)
_LAW = (
    "Article {0}. Everyone has the right to life, liberty and the security of person. No one shall be held in slavery "
    "or servitude; slavery and the slave trade shall be prohibited in all their forms. All are equal before the law. "
)
_CODE = "def fibonacci(n):\n    if n < 2:\n        return n\n    return fibonacci(n - 1) + fibonacci(n - 2)\n\n\nprint("

TEXTS = [
    "Hello",
    "The capital of France is",
    "Once upon a time",
    "Water boils at 100 degrees Celsius because",
    "Q: What is 17 + 25?\nA:",
    "Die Hauptstadt von Deutschland heißt",
    "La philosophie est une discipline qui",
    "El sol sale por el este y se pone por el",
    "日本の首都は",
    "Столица России —",
    "北京是中国的",
    "العاصمة المصرية هي",
    "Emoji: 🙂🙃🤖 means",
    _CODE,
    _STORY,
    _STORY * 2 + "The whale",
    _STORY * 2 + "The captain",
    _STORY * 5,
    "".join(_LAW.format(i) for i in range(1, 12)),
]
LONGEST = "".join(_LAW.format(i) for i in range(1, 200))  # cut to 4,000 tokens
