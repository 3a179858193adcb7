"""Texts in encodings that say nothing of themselves."""

import random

import pytest

from nnx_cli.data import charset_guess
from nnx_cli.data.charset_guess import CANDIDATES, guess_encoding, guess_wide

TEXTS = {
    "ru": "Река текла медленно, и старый мост отражался в воде. Яблони "
    "цвели до самого мая. — Ты придёшь? — спросил он.",
    "uk": "Ріка текла повільно, і старий міст відбивався у воді. Їхні "
    "яблуні цвіли до самого травня, а діти гралися біля хати.",
    "bg": "Реката течеше бавно, а старият мост се оглеждаше във водата. Ябълките цъфтяха до средата на май.",
    "el": "Το ποτάμι κυλούσε αργά και η παλιά γέφυρα καθρεφτιζόταν στο νερό. Οι μηλιές άνθιζαν ως τον Μάιο.",
    "he": "הנהר זרם לאט והגשר הישן השתקף במים. עצי התפוח פרחו עד אמצע האביב והילדים שיחקו ליד הבית.",
    "ar": "كان النهر يجري ببطء والجسر القديم ينعكس في الماء. أزهرت أشجار "
    "التفاح حتى منتصف الربيع ولعب الأطفال قرب البيت.",
    "th": "แม่น้ำไหลช้าและสะพานเก่าสะท้อนอยู่ในน้ำ ต้นแอปเปิลออกดอกจนถึงกลางฤดูใบไม้ผลิ เด็กเล่นอยู่ใกล้บ้าน",
    "tr": "Irmak yavaşça akıyordu ve eski köprü suya yansıyordu. Elma "
    "ağaçları ilkbaharın ortasına kadar çiçek açtı, çocuklar "
    "gülüşüyordu.",
    "pl": "Rzeka płynęła powoli, a stary most odbijał się w wodzie. "
    "Jabłonie kwitły aż do maja, dzieci śpiewały źle, lecz głośno.",
    "cs": "Řeka tekla pomalu a starý most se zrcadlil ve vodě. Jabloně "
    "kvetly až do května, děti šťastně křičely za domem.",
    "hu": "A folyó lassan folyt, és a régi híd tükröződött a vízben. Az "
    "almafák májusig virágoztak, a gyerekek hűvös erdőben ültek.",
    "lt": "Upė tekėjo lėtai, o senas tiltas atsispindėjo vandenyje. "
    "Obelys žydėjo iki gegužės, vaikai žaidė šalia namų.",
    "vi": "đươ\u0300ng la\u0300ng bên sông, mâ\u0301y đư\u0301a tre\u0309 vui đu\u0300a dươ\u0301i ă\u0301nh "
    "nă\u0301ng, nươ\u0301c cha\u0309y êm đê\u0300m",
    "de": "Der Fluß floß träge, und die alte Brücke spiegelte sich. "
    "Äpfel blühten bis zum Mai, Mädchen und Söhne grüßten schön.",
    "fr": "La rivière coulait, le vieux pont se reflétait à côté. Les "
    "pommiers fleurirent jusqu’en été ; l’élève était très gêné, "
    "ça ira.",
    "es": "El río corría despacio y el puente se veía en él. ¿Vendrás "
    "mañana? El niño jugó con su compañera: «¡qué día más frío!»",
    "sv": "Ån flöt långsamt, och den gamla bron speglade sig på ytan. "
    "Äppelträden blommade ända till maj när barnen lekte på ängen.",
    "pt": "O rio corria devagar e a ponte não se movia. As maçãs só "
    "nascem no verão, e as crianças estão à espera do pão da avó.",
    "ja": "川はゆっくりと流れ、古い橋が水に映っていた。りんごの花は五月まで咲き、子どもたちは家のそばで遊んでいる。",
    "ko": "강은 천천히 흐르고 오래된 다리가 물에 비쳤다. 사과꽃은 오월까지 피었고 아이들은 집 앞에서 놀고 있었다.",
    "zh": "河水慢慢地流着，古老的桥映在水里。苹果树的花一直开到五月，孩子们在家门口玩，老人坐在树下说话。",
    "zh-Hant": "河水慢慢地流著，古老的橋映在水裡。蘋果樹的花一直開到五月，孩子們在家門口玩，老人坐在樹下說話。",
}
TEXTS["kk"] = (
    "Өзен баяу ағып, ескі көпір суға шағылысты. Алма ағаштары мамырға дейін гүлдеді, балалар үйдің жанында ойнады."
)
TEXTS["eo"] = (
    "La rivero fluis malrapide, kaj la ponto speguliĝis en la akvo. Ĉiuj infanoj ĝoje ludis ĉe la domo ĝis ĵaŭdo."
)
ENCODINGS = {
    "kk": "kz1048",
    "eo": "iso8859-3",
    "ru": "cp1251 koi8-r cp866 iso8859-5 mac-cyrillic cp855",
    "uk": "cp1251 koi8-u",
    "bg": "cp1251 iso8859-5",
    "el": "cp1253 iso8859-7 cp737",
    "he": "cp1255 iso8859-8 cp862",
    "ar": "cp1256 iso8859-6",
    "th": "cp874 tis-620",
    "tr": "cp1254 iso8859-9 cp857",
    "pl": "cp1250 iso8859-2 cp852",
    "cs": "cp1250 iso8859-2 cp852",
    "hu": "cp1250 iso8859-2",
    "lt": "cp1257 iso8859-13",
    "vi": "cp1258",
    "de": "cp1252 latin-1 mac-roman cp850 cp437",
    "fr": "cp1252 mac-roman",
    "es": "cp1252 mac-roman cp850",
    "sv": "cp1252 cp850",
    "pt": "cp1252 mac-roman cp850",
    "ja": "cp932 shift_jis euc-jp",
    "ko": "cp949 euc-kr johab",
    "zh": "gb18030 gbk gb2312",
    "zh-Hant": "big5 big5hkscs gb18030",
}
CASES = [(language, name) for language, names in ENCODINGS.items() for name in names.split()]


@pytest.mark.parametrize(("language", "encoding"), CASES)
def test_a_paragraph_is_read_as_it_was_written(language, encoding):
    text = TEXTS[language].encode(encoding, "ignore").decode(encoding)
    for written in (text, f"{text}\n" * 40, "plain words, 12 of them\n" * 500 + text):
        guess = guess_encoding(written.encode(encoding))
        assert written.encode(encoding).decode(guess.encoding) == written
        assert guess.confidence > 0.6


CAPITALS = [case for case in CASES if case[0] in ("ru", "uk", "bg", "kk", "el", "pl", "de", "fr", "sv")]


@pytest.mark.parametrize(("language", "encoding"), CAPITALS)
def test_capitals_are_read_as_they_were_written(language, encoding):
    """Headlines, old computers, shouting: in other encodings the same bytes are small letters."""
    text = TEXTS[language].upper().encode(encoding, "ignore").decode(encoding).replace("Ά", "Α")
    guess = guess_encoding(text.encode(encoding))
    assert text.encode(encoding).decode(guess.encoding) == text


OTHERS = {  # languages that have no paragraph above
    "af": "Die rivier het stadig gevloei en die brug is in die water weerspieël. Sê vir my hoekom die môre so koel is; "
    "ons gaan nêrens heen nie, én hulle wêreld is groot.",
    "sq": "Lumi rridhte ngadalë dhe ura e vjetër pasqyrohej në ujë. Mollët çelën deri në mes të pranverës.",
    "sl": "Reka je tekla počasi in stari most se je zrcalil v vodi. Otroci so se igrali pri hiši; žuželke brenčijo.",
    "ga": "Bhí an abhainn ag sileadh go mall. D’fhás na crainn úll go dtí mí na Bealtaine, agus d'imir na páistí.",
    "lb": "De Floss ass lues gelaf. D'Äppelbeem hunn bis de Mee gebléit; d'Kanner hunn gespillt, ëmmer schéin.",
    "mt": "Ix-xmara kienet għaddejja bil-mod u l-pont l-antik kien jidher fl-ilma. Iż-żgħażagħ ħarġu u ċċaqilqu.",
    "mk": "Реката течеше бавно, а стариот мост се гледаше во водата. Ѓорѓи и Љубица ќе дојдат, децата си играа.",
    "be": "Рака цякла павольна, і стары мост адлюстроўваўся ў вадзе. Яблыні цвілі да мая, дзеці гулялі каля хаты.",
}
WRITTEN_IN = {"sl": "cp1250", "mt": "iso8859-3", "mk": "cp1251", "be": "cp1251"}


@pytest.mark.parametrize("language", OTHERS)
def test_relatives_of_those_languages(language):
    data = OTHERS[language].encode(WRITTEN_IN.get(language, "cp1252"))
    assert data.decode(guess_encoding(data).encoding) == OTHERS[language]


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
@pytest.mark.parametrize("language", TEXTS)
def test_wide_characters_without_a_mark(language, encoding):
    guess = guess_wide(f"{TEXTS[language]}\n".encode(encoding))
    assert guess.encoding == encoding and guess.confidence > 0.8


@pytest.mark.parametrize(
    "line",
    [
        "café",
        "naïve plan",
        "Müller",
        "niño",
        "Ça va",
        "“quoted”",
        "it’s",
        "nine – ten",
        "Öl",
        "the price was £5, not €4",
    ],
)
def test_one_line_with_one_accent_is_western(line):
    guess = guess_encoding(line.encode("cp1252"))
    assert line.encode("cp1252").decode(guess.encoding) == line and guess.confidence > 0.5


@pytest.mark.parametrize("word", ["Привет", "Αγορά", "שלום עולם", "مرحبا بكم", "สวัสดีครับ", "こんにちは", "안녕하세요"])
def test_a_greeting_is_enough_for_a_script(word):
    encoding = dict(zip("ПΑשمสこ안", "cp1251 cp1253 cp1255 cp1256 cp874 cp932 cp949".split(), strict=True))[word[0]]
    guess = guess_encoding(word.encode(encoding))
    assert (guess.encoding, guess.confidence > 0.5) == (encoding, True)


def noise(low, high, n):
    return bytes(random.Random(n).choices(range(low, high), k=n))


@pytest.mark.parametrize(
    "data",
    [
        TEXTS["de"].encode("cp037", "replace") * 3,
        TEXTS["fr"].encode("cp500", "replace") * 3,
        noise(128, 256, 2000),
        noise(32, 256, 2000),
        noise(160, 256, 40),
    ],
    ids=["EBCDIC", "EBCDIC, French", "noise", "noise with ASCII", "a little noise"],
)
def test_what_reads_like_no_language_is_not_believed(data):
    assert guess_encoding(data).confidence < 0.3
    assert guess_wide(data + bytes(-len(data) % 4)).confidence < 0.3


@pytest.mark.parametrize("step", [1, 2, 3])
def test_wherever_the_sample_is_cut(step):
    """No white space, so that nothing tells where a character begins."""
    text = TEXTS["zh"] * 200
    guess = guess_encoding(b"x" * step + text.encode("gbk"))
    assert guess.encoding == "gb18030" and guess.confidence > 0.8


def test_the_sample_is_small_and_from_everywhere():
    lines = [f"{i} größer\n".encode("cp1252") for i in range(100_000)]
    samples = charset_guess._samples(b"".join(lines))
    assert len(samples) == charset_guess.N_SAMPLES and sum(map(len, samples)) <= charset_guess.SAMPLE_BYTES
    places = [int(sample.split(b"\n")[1].split()[0]) for sample in samples]
    assert all(abs(place - i * 100_000 / len(samples)) < 2000 for i, place in enumerate(places))


def test_frames_of_dos_are_no_thai():
    text = "╔══════════════╗\n║ Release notes ║\n╚══════════════╝\nplain words about it\n" * 5
    guess = guess_encoding(text.encode("cp437"))
    assert text.encode("cp437").decode(guess.encoding) == text and guess.confidence > 0.6


def test_every_candidate_is_one_of_pythons():
    for encoding, (languages, _) in CANDIDATES.items():
        assert b" ".decode(encoding) == " "
        assert set(languages.split()) <= {*charset_guess.ALPHABETS, *charset_guess.COMMON}
