"""The tables of common knowledge behind the built-in question set, written for this project; see make_facts.py.

In a table an entry ends at a semicolon: `x = gold / other gold`, or `x, z = gold` where two things are asked about;
a number is spoken as its word, and its digits are a gold too. Facts that are disputed, about to change,
or asked by the Llama Questions benchmark are left out: training on this set must not train on that test.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

# name | capital | continent | currency | main language; a dash where the answer is disputed or about to change
COUNTRIES = """
France | - | Europe | euro / euros | French
Germany | Berlin | Europe | euro / euros | German
Italy | Rome | Europe | euro / euros | Italian
Spain | - | Europe | euro / euros | Spanish
Portugal | Lisbon | Europe | euro / euros | Portuguese
Ireland | Dublin | Europe | euro / euros | -
the United Kingdom | London | Europe | pound / pounds / sterling | English
the Netherlands | Amsterdam | Europe | euro / euros | Dutch
Belgium | Brussels | Europe | euro / euros | -
Switzerland | Bern / Berne | Europe | franc / francs | -
Austria | Vienna | Europe | euro / euros | German
Poland | Warsaw | Europe | zloty / złoty / zlotys | Polish
the Czech Republic | Prague | Europe | koruna / crown | -
Slovakia | Bratislava | Europe | euro / euros | Slovak
Hungary | Budapest | Europe | forint / forints | Hungarian
Romania | Bucharest | Europe | leu / lei | Romanian
Bulgaria | Sofia | Europe | - | Bulgarian
Greece | Athens | Europe | euro / euros | Greek
Albania | Tirana | Europe | lek | Albanian
Serbia | Belgrade | Europe | dinar / dinars | Serbian
Croatia | Zagreb | Europe | - | Croatian
Slovenia | Ljubljana | Europe | - | Slovene / Slovenian
Ukraine | Kyiv / Kiev | Europe | hryvnia | Ukrainian
Belarus | Minsk | Europe | - | -
Lithuania | Vilnius | Europe | - | Lithuanian
Latvia | Riga | Europe | - | Latvian
Estonia | Tallinn | Europe | - | Estonian
Finland | Helsinki | Europe | euro / euros | Finnish
Sweden | Stockholm | Europe | krona / kronor | Swedish
Norway | Oslo | Europe | krone / kroner | Norwegian
Denmark | Copenhagen | Europe | krone / kroner | Danish
Iceland | Reykjavik | Europe | krona / kronur | Icelandic
Russia | - | - | ruble / rubles / rouble / roubles | Russian
Turkey | - | - | lira | Turkish
Japan | - | Asia | - | Japanese
China | - | Asia | yuan / renminbi | Chinese / Mandarin
South Korea | - | Asia | - | Korean
North Korea | Pyongyang | Asia | - | Korean
Mongolia | Ulaanbaatar / Ulan Bator | Asia | - | Mongolian
India | - | Asia | - | -
Pakistan | Islamabad | Asia | rupee / rupees | -
Bangladesh | Dhaka | Asia | taka | Bengali / Bangla
Nepal | Kathmandu | Asia | rupee / rupees | Nepali
Thailand | Bangkok | Asia | baht | Thai
Vietnam | Hanoi | Asia | dong | Vietnamese
Cambodia | Phnom Penh | Asia | riel | Khmer / Cambodian
Laos | Vientiane | Asia | kip | Lao / Laotian
the Philippines | Manila | Asia | peso / pesos | -
Malaysia | Kuala Lumpur | Asia | ringgit | Malay / Malaysian
Indonesia | - | - | rupiah | Indonesian
Afghanistan | Kabul | Asia | - | -
Iran | Tehran / Teheran | Asia | rial / rials | Persian / Farsi
Iraq | Baghdad | Asia | dinar / dinars | Arabic
Saudi Arabia | Riyadh | Asia | riyal / riyals | Arabic
Jordan | Amman | Asia | dinar / dinars | Arabic
Syria | Damascus | Asia | - | Arabic
Lebanon | Beirut | Asia | - | Arabic
Qatar | Doha | Asia | riyal / riyals | Arabic
Oman | Muscat | Asia | rial / rials | Arabic
Egypt | Cairo | Africa | pound / pounds | Arabic
Libya | Tripoli | Africa | dinar / dinars | Arabic
Tunisia | Tunis | Africa | dinar / dinars | Arabic
Algeria | Algiers | Africa | dinar / dinars | Arabic
Morocco | - | Africa | dirham / dirhams | Arabic
Ethiopia | Addis Ababa | Africa | birr | -
Kenya | Nairobi | Africa | shilling / shillings | -
Uganda | Kampala | Africa | shilling / shillings | -
Ghana | Accra | Africa | cedi / cedis | -
Nigeria | Abuja | Africa | naira | -
Senegal | Dakar | Africa | - | -
Angola | Luanda | Africa | - | Portuguese
Zambia | Lusaka | Africa | kwacha | -
Zimbabwe | Harare | Africa | - | -
Mozambique | Maputo | Africa | - | -
Madagascar | Antananarivo | Africa | - | -
Rwanda | Kigali | Africa | - | -
Sudan | Khartoum | Africa | - | Arabic
South Africa | - | - | rand | -
Canada | Ottawa | North America | - | -
the United States | Washington | North America | dollar / dollars | English
Mexico | - | North America | peso / pesos | Spanish
Cuba | Havana | - | peso / pesos | Spanish
Jamaica | Kingston | - | dollar / dollars | -
Guatemala | Guatemala City | - | quetzal / quetzals | Spanish
Honduras | Tegucigalpa | - | lempira | Spanish
Costa Rica | San Jose | - | colon / colones | Spanish
Panama | Panama City | - | - | Spanish
Nicaragua | Managua | - | - | Spanish
the Dominican Republic | Santo Domingo | - | peso / pesos | Spanish
Brazil | Brasilia | South America | - | Portuguese
Argentina | Buenos Aires | South America | peso / pesos | Spanish
Chile | Santiago | South America | peso / pesos | Spanish
Peru | Lima | South America | - | Spanish
Colombia | Bogota | South America | peso / pesos | Spanish
Venezuela | Caracas | South America | bolivar / bolivars | Spanish
Ecuador | Quito | South America | dollar / dollars | Spanish
Uruguay | Montevideo | South America | peso / pesos | Spanish
Paraguay | Asuncion | South America | - | -
Australia | - | - | dollar / dollars | English
New Zealand | - | - | dollar / dollars | English
"""


@dataclass(frozen=True)
class Kind:
    """Questions of one form about the entries of one table.

    In the templates {x} and {z} are what is asked about and {y} the first gold; capitals start a sentence, {a_y} has
    its article. `entity` says which part decides about being held out.
    """

    name: str
    questions: tuple[str, ...]
    answer: str
    table: str
    entity: Literal["x", "z", "y", "xy"] = "x"


def country_column(column: int) -> str:
    rows = [[cell.strip() for cell in line.split("|")] for line in COUNTRIES.strip().splitlines()]
    return "; ".join(f"{row[0]} = {row[column]}" for row in rows if row[column] != "-")


ASKED = {(9, "-", 5), (3, "*", 7), (2, "*", 2)}  # by Llama Questions, or nearly


def sums() -> str:
    return "; ".join(f"{a}, {b} = {a + b}" for a in range(2, 10) for b in range(2, 10) if a != b)


def products() -> str:
    pairs = [(a, b) for a in range(2, 11) for b in range(a, 11) if (a, "*", b) not in ASKED]
    return "; ".join(f"{a}, {b} = {a * b}" for a, b in pairs)


def differences() -> str:
    pairs = [(a, b) for a in range(6, 16) for b in range(2, 8) if b < a != 2 * b and (a, "-", b) not in ASKED]
    return "; ".join(f"{a}, {b} = {a - b}" for a, b in pairs)


MONTHS = "January February March April May June July August September October November December"
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday"
ORDINALS = "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth"


def next_of(names: str, step: int) -> str:
    cycle = names.split()
    return "; ".join(f"{name} = {cycle[(i + step) % len(cycle)]}" for i, name in enumerate(cycle))


KINDS = (
    Kind(
        "capital",
        ("What is the capital of {x}?", "What is the capital city of {x}?", "Which city is the capital of {x}?"),
        "The capital of {x} is {y}.",
        country_column(1),
    ),
    Kind(
        "continent",
        ("Which continent is {x} in?", "On which continent is {x}?", "What continent does {x} belong to?"),
        "{X} is in {y}.",
        country_column(2),
    ),
    Kind(
        "currency",
        ("What is the currency of {x}?", "What currency is used in {x}?", "Which currency do people use in {x}?"),
        "The currency of {x} is the {y}.",
        country_column(3),
    ),
    Kind(
        "language",
        ("What is the main language of {x}?", "Which language do most people speak in {x}?"),
        "Most people in {x} speak {y}.",
        country_column(4),
    ),
    Kind(
        "city",
        ("Which country is {x} in?", "In which country is the city of {x}?", "What country is {x} in?"),
        "{X} is in {y}.",
        """
        Milan = Italy; Naples = Italy; Florence = Italy; Barcelona = Spain; Seville = Spain;
        Munich = Germany; Hamburg = Germany; Cologne = Germany; Marseille = France; Lyon = France;
        Bordeaux = France; Krakow = Poland; Porto = Portugal; Geneva = Switzerland; Zurich = Switzerland;
        Salzburg = Austria; Antwerp = Belgium; Rotterdam = the Netherlands / Netherlands;
        Gothenburg = Sweden; Bergen = Norway; Thessaloniki = Greece; Istanbul = Turkey;
        Vladivostok = Russia; Osaka = Japan; Kyoto = Japan; Shanghai = China; Busan = South Korea;
        Mumbai = India; Kolkata = India; Karachi = Pakistan; Lagos = Nigeria; Casablanca = Morocco;
        Mombasa = Kenya; Cape Town = South Africa; Johannesburg = South Africa; Toronto = Canada;
        Montreal = Canada; Chicago = the United States / United States / USA / US / America;
        Los Angeles = the United States / United States / USA / US / America; Tijuana = Mexico;
        Rio de Janeiro = Brazil; Medellin = Colombia; Sydney = Australia; Melbourne = Australia;
        Auckland = New Zealand; Da Nang = Vietnam; Chiang Mai = Thailand; Dresden = Germany
        """,
        entity="y",
    ),
    Kind(
        "landmark",
        ("In which country is {x}?", "Which country is home to {x}?", "What country is {x} in?"),
        "{X} is in {y}.",
        """
        the Eiffel Tower = France; the Louvre = France; the Palace of Versailles = France;
        the Colosseum = Italy; the Leaning Tower of Pisa = Italy; Mount Vesuvius = Italy;
        the Sagrada Familia = Spain; the Alhambra = Spain; the Brandenburg Gate = Germany;
        Neuschwanstein Castle = Germany; the Taj Mahal = India; the Forbidden City = China;
        Machu Picchu = Peru; Chichen Itza = Mexico; Mount Fuji = Japan; Angkor Wat = Cambodia;
        Petra = Jordan; the Acropolis = Greece; the Kremlin = Russia; Red Square = Russia;
        the Great Sphinx = Egypt; the Valley of the Kings = Egypt; Table Mountain = South Africa;
        the Sydney Opera House = Australia; the Great Barrier Reef = Australia; the CN Tower = Canada;
        the statue of Christ the Redeemer = Brazil;
        the Charles Bridge = the Czech Republic / Czech Republic / Czechia; the Blue Mosque = Turkey;
        Buckingham Palace = the United Kingdom / United Kingdom / UK / England / Britain;
        Stonehenge = the United Kingdom / United Kingdom / UK / England / Britain;
        the Grand Canyon = the United States / United States / USA / US / America;
        the Golden Gate Bridge = the United States / United States / USA / US / America
        """,
        entity="y",
    ),
    Kind(
        "author",
        ("Who wrote {x}?", "Who is the author of {x}?", "Which author wrote {x}?"),
        "{X} was written by {y}.",
        """
        Hamlet = William Shakespeare / Shakespeare; Macbeth = William Shakespeare / Shakespeare;
        Othello = William Shakespeare / Shakespeare; King Lear = William Shakespeare / Shakespeare;
        Oliver Twist = Charles Dickens / Dickens; Great Expectations = Charles Dickens / Dickens;
        A Christmas Carol = Charles Dickens / Dickens; Emma = Jane Austen / Austen;
        Sense and Sensibility = Jane Austen / Austen; Jane Eyre = Charlotte Bronte / Charlotte Brontë;
        Wuthering Heights = Emily Bronte / Emily Brontë; Frankenstein = Mary Shelley / Shelley;
        Dracula = Bram Stoker / Stoker; Treasure Island = Robert Louis Stevenson / Stevenson;
        Moby Dick = Herman Melville / Melville; The Scarlet Letter = Nathaniel Hawthorne / Hawthorne;
        The Adventures of Tom Sawyer = Mark Twain / Twain; Huckleberry Finn = Mark Twain / Twain;
        War and Peace = Leo Tolstoy / Tolstoy; Anna Karenina = Leo Tolstoy / Tolstoy;
        Crime and Punishment = Fyodor Dostoevsky / Dostoevsky / Dostoyevsky;
        The Brothers Karamazov = Fyodor Dostoevsky / Dostoevsky / Dostoyevsky;
        Don Quixote = Miguel de Cervantes / Cervantes; The Divine Comedy = Dante Alighieri / Dante;
        The Odyssey = Homer; The Iliad = Homer; The Aeneid = Virgil;
        Faust = Johann Wolfgang von Goethe / Goethe; Les Miserables = Victor Hugo / Hugo;
        The Three Musketeers = Alexandre Dumas / Dumas; Madame Bovary = Gustave Flaubert / Flaubert;
        Around the World in Eighty Days = Jules Verne / Verne; The Time Machine = H. G. Wells / Wells;
        The War of the Worlds = H. G. Wells / Wells; The Jungle Book = Rudyard Kipling / Kipling;
        Animal Farm = George Orwell / Orwell; Brave New World = Aldous Huxley / Huxley;
        The Hobbit = J. R. R. Tolkien / Tolkien; The Lord of the Rings = J. R. R. Tolkien / Tolkien;
        The Old Man and the Sea = Ernest Hemingway / Hemingway;
        The Sun Also Rises = Ernest Hemingway / Hemingway; The Grapes of Wrath = John Steinbeck / Steinbeck;
        Of Mice and Men = John Steinbeck / Steinbeck; Lord of the Flies = William Golding / Golding;
        Ulysses = James Joyce / Joyce; Mrs. Dalloway = Virginia Woolf / Woolf;
        The Metamorphosis = Franz Kafka / Kafka; Peter Pan = J. M. Barrie / Barrie;
        Alice in Wonderland = Lewis Carroll / Carroll;
        Murder on the Orient Express = Agatha Christie / Christie
        """,
        entity="y",
    ),
    Kind(
        "composer",
        ("Who composed {x}?", "Which composer wrote {x}?", "Who is the composer of {x}?"),
        "{X} was composed by {y}.",
        """
        the Moonlight Sonata = Ludwig van Beethoven / Beethoven;
        Fur Elise = Ludwig van Beethoven / Beethoven;
        the Brandenburg Concertos = Johann Sebastian Bach / Bach;
        The Magic Flute = Wolfgang Amadeus Mozart / Mozart; Don Giovanni = Wolfgang Amadeus Mozart / Mozart;
        Swan Lake = Pyotr Ilyich Tchaikovsky / Tchaikovsky;
        The Nutcracker = Pyotr Ilyich Tchaikovsky / Tchaikovsky; Messiah = George Frideric Handel / Handel;
        The Barber of Seville = Gioachino Rossini / Rossini; Aida = Giuseppe Verdi / Verdi;
        La Traviata = Giuseppe Verdi / Verdi; Carmen = Georges Bizet / Bizet;
        The Blue Danube = Johann Strauss / Strauss; Madame Butterfly = Giacomo Puccini / Puccini;
        The Rite of Spring = Igor Stravinsky / Stravinsky; Bolero = Maurice Ravel / Ravel;
        Peter and the Wolf = Sergei Prokofiev / Prokofiev; Rhapsody in Blue = George Gershwin / Gershwin;
        Clair de lune = Claude Debussy / Debussy; The Planets = Gustav Holst / Holst;
        the Hungarian Rhapsodies = Franz Liszt / Liszt; Peer Gynt = Edvard Grieg / Grieg
        """,
        entity="y",
    ),
    Kind(
        "person",
        ("Who {x} {z}?", "Can you tell me who {x} {z}?", "Which person {x} {z}?"),
        "{Y} {x} {z}.",
        """
        painted, Guernica = Pablo Picasso / Picasso;
        painted, The Last Supper = Leonardo da Vinci / da Vinci / Leonardo;
        painted, the ceiling of the Sistine Chapel = Michelangelo;
        painted, The Scream = Edvard Munch / Munch; painted, The Night Watch = Rembrandt;
        painted, Girl with a Pearl Earring = Johannes Vermeer / Vermeer;
        painted, The Birth of Venus = Sandro Botticelli / Botticelli;
        painted, The Kiss = Gustav Klimt / Klimt;
        painted, The Persistence of Memory = Salvador Dali / Salvador Dalí / Dali / Dalí;
        invented, dynamite = Alfred Nobel / Nobel; invented, the phonograph = Thomas Edison / Edison;
        invented, the printing press in Europe = Johannes Gutenberg / Gutenberg;
        invented, the World Wide Web = Tim Berners-Lee / Berners-Lee;
        invented, the cotton gin = Eli Whitney / Whitney;
        invented, the first electric battery = Alessandro Volta / Volta;
        invented, the lightning rod = Benjamin Franklin / Franklin;
        created, Linux = Linus Torvalds / Torvalds; discovered, penicillin = Alexander Fleming / Fleming;
        discovered, radium = Marie Curie / Curie / the Curies;
        discovered, X-rays = Wilhelm Roentgen / Roentgen / Röntgen / Rontgen;
        developed, the theory of relativity = Albert Einstein / Einstein;
        proposed, evolution by natural selection = Charles Darwin / Darwin;
        created, the periodic table of the elements = Dmitri Mendeleev / Mendeleev;
        founded, Microsoft with Paul Allen = Bill Gates / Gates;
        was, the first human in space = Yuri Gagarin / Gagarin;
        founded, the Mongol Empire = Genghis Khan / Chinggis Khan
        """,
        entity="y",
    ),
    Kind(
        "symbol",
        ("What is the chemical symbol for {x}?", "What is the chemical symbol of {x}?"),
        "The chemical symbol for {x} is {y}.",
        """
        silver = Ag; copper = Cu; mercury = Hg; zinc = Zn; aluminum = Al; titanium = Ti; argon = Ar;
        barium = Ba; manganese = Mn; chromium = Cr; bromine = Br; cobalt = Co; krypton = Kr; cadmium = Cd;
        gallium = Ga; germanium = Ge; rubidium = Rb; palladium = Pd
        """,
    ),
    Kind(
        "opposite",
        ("What is the opposite of {x}?", "Which word means the opposite of {x}?", "What word is the opposite of {x}?"),
        "The opposite of {x} is {y}.",
        """
        hot = cold; up = down; left = right; day = night; black = white; big = small / little; fast = slow;
        happy = sad / unhappy; early = late; full = empty; high = low; open = closed / close / shut;
        push = pull; buy = sell; win = lose; love = hate / hatred; war = peace; dark = light / bright;
        rich = poor; strong = weak; thick = thin; wet = dry; long = short; heavy = light; soft = hard;
        inside = outside; north = south; east = west; first = last; true = false; arrive = leave / depart;
        alive = dead; front = back / rear; clean = dirty / unclean; near = far; noisy = quiet / silent;
        deep = shallow; wide = narrow; cheap = expensive; brave = cowardly / coward / timid; male = female;
        increase = decrease; maximum = minimum; ancient = modern; friend = enemy / foe; laugh = cry;
        give = take / receive; remember = forget; positive = negative; public = private; import = export;
        victory = defeat; absent = present; tall = short; above = below / beneath; success = failure;
        question = answer; always = never; beautiful = ugly; before = after; sharp = blunt / dull;
        tight = loose
        """,
        entity="xy",
    ),
    Kind(
        "plural",
        ("What is the plural of {x}?", "What is the plural form of the word {x}?"),
        "The plural of {x} is {y}.",
        """
        mouse = mice; child = children; foot = feet; tooth = teeth; goose = geese; man = men; woman = women;
        ox = oxen; leaf = leaves; knife = knives; wolf = wolves; person = people / persons;
        cactus = cacti / cactuses; life = lives; wife = wives; loaf = loaves; thief = thieves;
        potato = potatoes; tomato = tomatoes; baby = babies; city = cities; box = boxes; church = churches;
        bus = buses; hero = heroes; story = stories; shelf = shelves; calf = calves; crisis = crises;
        country = countries; berry = berries; half = halves; watch = watches; lady = ladies; fox = foxes;
        elf = elves; butterfly = butterflies; brush = brushes
        """,
    ),
    Kind(
        "past_tense",
        (
            "What is the past tense of {x}?",
            "What is the past tense of the verb {x}?",
            "What is the simple past of the verb {x}?",
        ),
        "The past tense of {x} is {y}.",
        """
        go = went; eat = ate; see = saw; run = ran; take = took; give = gave; come = came; write = wrote;
        drive = drove; speak = spoke; break = broke; buy = bought; bring = brought; think = thought;
        catch = caught; teach = taught; fight = fought; find = found; fly = flew; grow = grew; know = knew;
        throw = threw; draw = drew; drink = drank; sing = sang; swim = swam; begin = began; sit = sat;
        sleep = slept; keep = kept; leave = left; feel = felt; lose = lost; make = made; sell = sold;
        tell = told; stand = stood; hold = held; hear = heard; build = built; send = sent; spend = spent;
        pay = paid; fall = fell; forget = forgot; choose = chose; wear = wore; steal = stole; ride = rode;
        hide = hid; become = became; meet = met; shake = shook; understand = understood
        """,
    ),
    Kind(
        "young",
        ("What is a baby {x} called?", "What do you call a baby {x}?", "What is the name for a baby {x}?"),
        "A baby {x} is called {a_y}.",
        """
        cat = kitten / kittens; dog = puppy / puppies / pup; cow = calf / calves; horse = foal / foals;
        sheep = lamb / lambs; pig = piglet / piglets; goat = kid / kids; duck = duckling / ducklings;
        goose = gosling / goslings; chicken = chick / chicks; bear = cub / cubs; lion = cub / cubs;
        tiger = cub / cubs; kangaroo = joey / joeys; deer = fawn / fawns; frog = tadpole / tadpoles;
        swan = cygnet / cygnets; owl = owlet / owlets / chick; eagle = eaglet / eaglets / chick;
        seal = pup / pups; elephant = calf / calves; whale = calf / calves; dolphin = calf / calves;
        giraffe = calf / calves; butterfly = caterpillar / larva; koala = joey / joeys;
        donkey = foal / foals; zebra = foal / foals; spider = spiderling / spiderlings;
        turtle = hatchling / hatchlings; penguin = chick / chicks; hare = leveret / leverets
        """,
    ),
    Kind(
        "animal_class",
        ("What kind of animal is {x}?", "What type of animal is {x}?", "Which class of animals does {x} belong to?"),
        "{X} is {a_y}.",
        """
        a salmon = fish; a shark = fish; a tuna = fish; a trout = fish; a cod = fish; a sardine = fish;
        an eagle = bird / birds; an ostrich = bird / birds; a penguin = bird / birds;
        a parrot = bird / birds; an owl = bird / birds; a sparrow = bird / birds; a pigeon = bird / birds;
        a flamingo = bird / birds; a swan = bird / birds; a crow = bird / birds; a duck = bird / birds;
        an ant = insect / insects; a bee = insect / insects; a mosquito = insect / insects;
        a beetle = insect / insects; a cockroach = insect / insects; a butterfly = insect / insects;
        a grasshopper = insect / insects; a moth = insect / insects; a snake = reptile / reptiles;
        a lizard = reptile / reptiles; a crocodile = reptile / reptiles; a turtle = reptile / reptiles;
        an iguana = reptile / reptiles / lizard / lizards; a cobra = reptile / reptiles / snake / snakes;
        a chameleon = reptile / reptiles / lizard / lizards; a frog = amphibian / amphibians;
        a toad = amphibian / amphibians; a salamander = amphibian / amphibians;
        a newt = amphibian / amphibians; a whale = mammal / mammals; a dolphin = mammal / mammals;
        a bat = mammal / mammals; a kangaroo = mammal / mammals / marsupial / marsupials;
        a seal = mammal / mammals; an elephant = mammal / mammals; a mouse = mammal / mammals;
        a giraffe = mammal / mammals
        """,
    ),
    Kind(
        "color",
        ("What color is {x}?", "Which color is {x}?", "What is the color of {x}?"),
        "{X} is {y}.",
        """
        grass = green; snow = white; blood = red; coal = black; a ripe banana = yellow;
        the clear daytime sky = blue; a lemon = yellow; an emerald = green; a ruby = red; a sapphire = blue;
        a carrot = orange; milk = white; a ripe strawberry = red; chocolate = brown; a flamingo = pink;
        a school bus in America = yellow; a fire truck = red; a polar bear = white; a cucumber = green;
        an elephant = gray / grey; a crow = black; a sunflower = yellow; spinach = green;
        a pumpkin = orange; soot = black; broccoli = green; a ripe tomato = red; salt = white;
        an eggplant = purple; flour = white; an egg yolk = yellow
        """,
    ),
    Kind(
        "color",
        ("What color do you get when you mix {x} and {z}?", "Which color do {x} and {z} paint make?"),
        "{X} and {z} make {y}.",
        "blue, yellow = green; red, yellow = orange; red, blue = purple / violet; red, white = pink; "
        "black, white = gray / grey",
        entity="xy",
    ),
    Kind(
        "count",
        ("How many {x} does {z} have?", "Can you tell me how many {x} {z} has?"),
        "{Z} has {y} {x}.",
        """
        sides, a triangle = 3; sides, a pentagon = 5; sides, a heptagon = 7; sides, an octagon = 8;
        sides, a decagon = 10; faces, a cube = 6; legs, a spider = 8; legs, an ant = 6; legs, a dog = 4;
        legs, a chicken = 2; legs, a bee = 6; legs, a cow = 4; legs, a crab = 10; arms, an octopus = 8;
        wheels, a tricycle = 3; wheels, a normal car = 4; strings, a violin = 4; strings, a cello = 4;
        keys, a piano = 88; sides, a coin = 2; letters, the English alphabet = 26;
        squares, a chess board = 64; players, a soccer team = 11; players, a basketball team = 5;
        cards, a standard deck = 52; states, the United States = 50; rings, the Olympic symbol = 5;
        faces, a standard die = 6; hearts, an octopus = 3; chambers, the human heart = 4;
        lights, a traffic light = 3
        """,
        entity="z",
    ),
    Kind(
        "unit",
        ("How many {x} are in {z}?", "How many {x} are there in {z}?"),
        "There are {y} {x} in {z}.",
        """
        months, a year = 12; weeks, a year = 52; days, a leap year = 366; years, a decade = 10;
        years, a century = 100; years, a millennium = 1000; eggs, a dozen = 12; shoes, a pair = 2;
        inches, a foot = 12; feet, a yard = 3; centimeters, a meter = 100; meters, a kilometer = 1000;
        grams, a kilogram = 1000; millimeters, a centimeter = 10; milliliters, a liter = 1000;
        ounces, a pound = 16; cents, a dollar = 100; cents, a dime = 10; cents, a nickel = 5;
        cents, a quarter = 25; quarts, a gallon = 4; degrees, a right angle = 90;
        degrees, a full circle = 360; bits, a byte = 8; seasons, a year = 4; minutes, half an hour = 30;
        minutes, a quarter of an hour = 15; hours, two days = 48; days, two weeks = 14;
        months, two years = 24; signs, the zodiac = 12
        """,
        entity="z",
    ),
    Kind(
        "addition",
        ("What is {x} plus {z}?", "How much is {x} plus {z}?"),
        "{X} plus {z} is {y}.",
        sums(),
        entity="xy",
    ),
    Kind(
        "subtraction",
        ("What is {x} minus {z}?", "How much is {x} minus {z}?"),
        "{X} minus {z} is {y}.",
        differences(),
        entity="xy",
    ),
    Kind(
        "multiplication",
        ("What is {x} times {z}?", "How much is {x} times {z}?"),
        "{X} times {z} is {y}.",
        products(),
        entity="xy",
    ),
    Kind(
        "calendar",
        ("What month comes after {x}?", "Which month follows {x}?"),
        "The month after {x} is {y}.",
        next_of(MONTHS, 1),
    ),
    Kind(
        "calendar",
        ("What month comes before {x}?", "Which month comes right before {x}?"),
        "The month before {x} is {y}.",
        next_of(MONTHS, -1),
    ),
    Kind(
        "calendar",
        ("What day comes after {x}?", "Which day of the week follows {x}?"),
        "The day after {x} is {y}.",
        next_of(DAYS, 1),
    ),
    Kind(
        "calendar",
        ("What day comes before {x}?", "Which day of the week comes before {x}?"),
        "The day before {x} is {y}.",
        next_of(DAYS, -1),
    ),
    Kind(
        "calendar",
        ("What is the {x} month of the year?", "Which month is the {x} month of the year?"),
        "The {x} month of the year is {y}.",
        "; ".join(f"{o} = {m}" for o, m in zip(ORDINALS.split(), MONTHS.split(), strict=True)),
        entity="y",
    ),
    Kind(
        "occupation",
        ("What do you call a person who {x}?", "What is a person who {x} called?"),
        "A person who {x} is called {a_y}.",
        """
        puts out fires = firefighter / fireman; flies airplanes = pilot; bakes bread = baker;
        cuts hair = barber / hairdresser / hair stylist / hairstylist;
        treats sick animals = veterinarian / vet; fixes teeth = dentist; grows crops = farmer;
        writes books = author / writer; paints pictures = painter / artist; designs buildings = architect;
        works with wood = carpenter / woodworker; repairs water pipes = plumber; sells meat = butcher;
        catches fish = fisherman / fisher; teaches children = teacher; sews clothes = tailor / seamstress;
        takes photographs = photographer; studies stars = astronomer;
        delivers letters = mail carrier / mailman / postman / letter carrier / postal worker;
        travels into space = astronaut / cosmonaut; studies rocks = geologist; plays the piano = pianist;
        works in a library = librarian; digs coal = miner / coal miner;
        writes news stories = journalist / reporter; repairs cars = mechanic;
        prepares food in a restaurant = chef / cook;
        serves food in a restaurant = waiter / waitress / server; studies plants = botanist;
        writes music = composer / songwriter; performs operations = surgeon;
        translates speech = interpreter / translator; plays the violin = violinist;
        leads an orchestra = conductor; sells flowers = florist
        """,
    ),
)

# question | answer | golds: what fits no form; the entity is the first gold
GENERAL = """
What is the largest ocean on Earth? | The largest ocean on Earth is the Pacific. | Pacific
What is the tallest mountain in the world? | The tallest mountain in the world is Mount Everest. | Everest
Which planet is closest to the sun? | The planet closest to the sun is Mercury. | Mercury
Which planet is called the red planet? | Mars is called the red planet. | Mars
Which planet is famous for its rings? | Saturn is famous for its rings. | Saturn
Which planet do we live on? | We live on Earth. | Earth
What is the largest animal in the world? | The largest animal in the world is the blue whale. | blue whale / whale
What is the tallest animal in the world? | The tallest animal in the world is the giraffe. | giraffe
What do bees make? | Bees make honey. | honey
What is frozen water called? | Frozen water is called ice. | ice
What does a caterpillar turn into? | A caterpillar turns into a butterfly. | butterfly / moth
Which gas do people need to breathe? | People need to breathe oxygen. | oxygen
Which gas do plants take in from the air? | Plants take in carbon dioxide from the air. | carbon dioxide
Which star is at the center of the solar system? | The sun is at the center of the solar system. | sun
What goes around the Earth once a month? | The moon goes around the Earth once a month. | moon
Which organ pumps blood through the body? | The heart pumps blood through the body. | heart
Which organ do we think with? | We think with the brain. | brain
What do we breathe with? | We breathe with the lungs. | lungs / lung
What do we see with? | We see with our eyes. | eyes / eye
What do we hear with? | We hear with our ears. | ears / ear
What do we smell with? | We smell with our nose. | nose
What do we taste with? | We taste with our tongue. | tongue
Which metal is liquid at room temperature? | Mercury is liquid at room temperature. | mercury
What is bread mainly made from? | Bread is mainly made from flour. | flour / wheat
What is cheese made from? | Cheese is made from milk. | milk
What is wine made from? | Wine is made from grapes. | grapes / grape
What is glass made from? | Glass is made from sand. | sand / silica
What is paper made from? | Paper is made from wood. | wood / trees / tree / pulp
Which fruit are raisins made from? | Raisins are dried grapes. | grapes / grape
What do pandas mainly eat? | Pandas mainly eat bamboo. | bamboo
Which animal is called the king of the jungle? | The lion is called the king of the jungle. | lion
What is the hardest natural material? | The hardest natural material is diamond. | diamond / diamonds
What is the largest desert in Africa? | The largest desert in Africa is the Sahara. | Sahara
What is the longest river in Africa? | The longest river in Africa is the Nile. | Nile
Which river flows through London? | The Thames flows through London. | Thames
Which river flows through Paris? | The Seine flows through Paris. | Seine
What force pulls things to the ground? | Gravity pulls things to the ground. | gravity / gravitational
What do you call the study of numbers and shapes? | It is called mathematics. | mathematics / math / maths
What instrument tells the time? | A clock tells the time. | clock / watch
Which instrument measures temperature? | A thermometer measures temperature. | thermometer / thermometers
Which instrument shows where north is? | A compass shows where north is. | compass
Which season comes after winter? | Spring comes after winter. | spring
Which season comes after summer? | Autumn comes after summer. | autumn / fall
What is the coldest season of the year? | The coldest season of the year is winter. | winter
What is the hottest season of the year? | The hottest season of the year is summer. | summer
"""
