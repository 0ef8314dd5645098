"""The wording of the emoji world. Pairs of (question, answer); `{a|b}` draws one; capital words are slots.

No phrase outside the slots may use the name of an object, its plural or another word for it (`build.py` checks).
"""
ONE = (
    ("Where is the NAME?", "The NAME is on the SIDE side, near the HEIGHT{ of the picture| of the image|}."),
    ("{How big|How large} is the NAME?", "{It|The NAME} looks SIZE compared with the {whole picture|rest of the scene}."),
    ("What can be seen {at|towards} the HEIGHT SIDE?", "There is a NAME{ in that part|, and it is easy to make out| in that area}."),
    ("Can you describe the NAME?", "It is a SIZE NAME{, placed at the HEIGHT SIDE| that sits near the HEIGHT| on the SIDE side}."),
    ("What {stands out|catches the eye} here?", "{The SIZE NAME does|A SIZE NAME does}{, since little is around it|, because of where it is|}."),
    ("Which object is closest to the {HEIGHT SIDE|SIDE edge}?", "That would be the NAME."),
    ("Is the NAME {complete|fully visible}?", "Yes, the {whole NAME|NAME} can be seen{ without anything in front|}."),
    ("What {else|more} do you notice?", "{I also notice|One can also see|There is also} a {SIZE |}NAME{ at the HEIGHT|}."),
    ("Does the NAME look {new|well kept|old}?", "{It is hard to tell|Rather so}, {but the NAME has|as the NAME has} {clean edges|a tidy look|bright colours}."),
    ("What would you {show|point out} to a child?", "{I would start with the NAME|The NAME}, because {it is easy to name|children like it|it is SIZE and clear}."),
    ("How would you find the NAME?", "Look {to|at} the SIDE{ and then to the HEIGHT|, near the HEIGHT}, and the NAME is {there|right there}."),
    ("What {colour|shape} does the NAME have?", "The NAME keeps the {colours|shape} {one would expect|that it usually has}."),
)
TWO = (
    ("{How do|Where do} the FIRST and the SECOND {stand to each other|relate}?", "The FIRST is RELATION the SECOND."),
    ("{What is|Which object is} RELATION the SECOND?", "{It is the FIRST|The FIRST is}."),
    ("Which objects {share the scene|are seen together}?", "The FIRST and the SECOND {do|are}{, with the FIRST RELATION the SECOND|}."),
    ("What do the FIRST and the SECOND {suggest|tell us} together?", "They {suggest|hint} that {people come here often|this place is in use|someone was here today}."),
    ("Is the FIRST larger than the SECOND?", "That depends on the distance, but the FIRST is RELATION the SECOND."),
    ("Why might the FIRST be {so near|RELATION} the SECOND?", "{It may be chance|Someone may have put the FIRST there}, or it {keeps both at hand|saves space}."),
)
REASON_ONE = (
    ("Why might {there be a NAME|the NAME be there}?", "{Someone may need|People here may use} the NAME {often|every day}, so it {stays within reach|has its own spot}."),
    ("What does the NAME {suggest about|say about} this place?", "A NAME {suggests|tells us} that the place {serves a purpose|is not empty for long|follows a routine}."),
    ("How might {someone|a visitor} {use|react to} the NAME?", "{They|A visitor} could {walk over to the SIDE side|come closer} and {use the NAME|have a look at the NAME}."),
    ("What would change {without|if someone took away} the NAME?", "The SIDE side would look {empty|bare}, and the scene would {lose|miss} {some of its sense|a clue}."),
    ("What is the {likely|probable} reason for placing the NAME {there|at the HEIGHT}?", "{Most likely|Perhaps} the NAME {was wanted nearby|had to be somewhere}, and the HEIGHT {was free|had room}."),
    ("Could the NAME {belong to|come from} somebody we {cannot see|do not see}?", "{Yes, a NAME often has|It could, since a NAME may have} an owner {who is nearby|close by|who just left}."),
    ("If you {owned|kept} the NAME, what would you {care about|check first}?", "I would {make sure|see to it} that the NAME is {clean|safe|not in the way}."),
)
REFER = (
    ("What is the object {in|inside} the {region|area} BOX?", "{It is a|That is a|One sees a} NAME{ of SIZE size|}."),
    ("Please {give|state} the {bounding box|region} of the NAME.", "{It is|The NAME is at} BOX."),
    ("{Tell me about|Describe} BOX.", "{This is|We see} a SIZE NAME {at|near} the HEIGHT{ SIDE|}."),
)
ACTIVITY = (
    ("What might people do here?", "{People might|One could} DOING{ in this place| here|}."),
    ("{Why would|For what would} somebody come here?", "{Perhaps to|Most likely to|To} DOING{, as many do|}."),
    ("What {happened|went on} here {before|earlier}?", "{Somebody may have come to|It was perhaps time to} DOING."),
    ("What is this place {good|made} for?", "It {seems right|is fit} for those who want to DOING."),
)
SETTING = (
    ("What is the {lighting|light} like?", "The {lighting|light} is {even|soft|bright|gentle}{, and shadows hardly matter| across the whole scene|}."),
    ("{Is it|Does it seem} a {quiet|busy} place?", "It {seems|looks} {quiet|calm|lively} {at the moment|right now}, but that may change{ within minutes| later|}."),
    ("How would you describe the {background|surroundings}?", "The {background|backdrop} has {two wide areas|an upper and a lower part|plain surfaces}{ that meet at a straight line|}."),
    ("What is the {mood|feeling|atmosphere}?", "The {mood|atmosphere} is {friendly|ordinary|relaxed|cheerful}{, like a normal day|}."),
    ("Is there {much|a lot of} {space|air} {overhead|above}?", "The upper area {takes about half|is large} {and is plain|without detail}."),
    ("How does the ground look?", "The {ground|lower area} is {flat|even} and {of one tone|has hardly any detail}."),
    ("{Does|Would} this place feel {familiar|welcoming}?", "{Yes, many people|Most people} would {know such a place|feel at ease there|recognise it at once}."),
    ("What {time of day|season} could it be?", "{It is hard to say|One cannot be sure}, {yet it could be|but perhaps it is} {around noon|a mild afternoon|early in the day|late in spring}."),
)
FILLER = (
    ("Is the picture {clear|sharp}?", "{Yes, it is clear|It is sharp} enough to {make out the main parts|see what matters|study it}."),
    ("Who took this {photo|picture}?", "{Nobody knows|There is no way to know|It is not stated} who took it."),
    ("Is there any {text|writing} {in the image|to read}?", "No{, there is no readable text|, no words stand out|, at least none of importance}."),
    ("Could this be a drawing?", "It {looks|seems} more like {a simple composition|something put together by hand|a collage} than a {drawing|sketch}."),
    ("{How many people are|Is anybody} visible?", "{No people are visible|Nobody is in view|There is nobody}, only {things|objects} and their surroundings."),
    ("Does the image {look|feel} crowded?", "{Somewhat|Not really|A little}, {but|since} there is {still|enough} {space|room} between the parts."),
    ("What should {a viewer|one} pay attention to?", "{Position and size|Size and position|The order of things} {matter most|tell the most|are worth a look}."),
    ("Is the {camera|viewer} close?", "The {camera|viewer} {seems|appears} to be at {a normal|a moderate|an average} distance."),
    ("What {could|might} happen next?", "{Nothing special|Not much|Perhaps nothing} {seems about to happen|will happen soon}{, so the scene may stay as it is|}."),
    ("Is the background simple?", "{Yes, it is plain|It is rather plain}{ and leaves room for the rest| and does not distract|}."),
    ("Would this help {to learn|someone learning} words?", "{Yes, it could|It might}, because {each thing has a clear name|nothing is too unusual|the parts are easy to tell apart}."),
    ("Are the colours {bright|strong}?", "{They are fairly bright|Some are bright, some are not|Mostly yes}{, with soft edges|, and they differ well|}."),
    ("Is anything {moving|in motion}?", "{No motion can be seen|Everything appears still|It is a still moment}."),
    ("Do you {like|enjoy} this picture?", "I {have no feelings|cannot feel}, but {many would|people may|some would} {like its calm|find it pleasant|smile at it}."),
    ("How {old|recent} is this picture?", "{That cannot be told|There is no date on it|Nothing reveals its age}."),
    ("Is the image {balanced|well composed}?", "{Fairly so|More or less}: {the parts are spread out|no side is left empty|both halves have something to offer}."),
    ("Can you {summarise|sum up} it in one word?", "{Ordinary|Everyday|Simple|Cheerful}{ would do| is the word|}."),
    ("What is {unusual|strange} about it?", "{Not much|Little}{, apart from the flat style|, unless one looks for long|, except that sizes do not match}."),
    ("Would you {print|frame} it?", "{Why not|One could}, {if there is a wall for it|though it is rather small|as its style is neat}."),
    ("Is the image {cropped|cut off}?", "{It seems whole|No, the frame is complete|Nothing important seems cut}."),
    ("Are there {repeated|similar} things?", "{Each thing appears once|Nothing appears twice|I do not see repetition}."),
    ("Is the {lower|upper} half {more interesting|richer}?", "{Both halves|The two halves} {have their share|are about equal}{, so I would not choose|}."),
    ("Could you {count|list} everything{ quickly|}?", "{Yes, it takes a moment|It can be done} {because the number is small|as nothing is hidden}."),
    ("Does the style {remind you of|resemble} something?", "{It is close to|It resembles} {a sticker album|icons on a screen|a board game}."),
    ("Are the edges {blurred|soft}?", "{Slightly|A little}, {but not so much that it hurts|which suits the style}."),
    ("Is it {worth keeping|a good example}?", "{As an example, yes|It serves its purpose}, {even if it wins no prize|though others may be better}."),
    ("What would you {ask|want to know} next?", "I would {ask about distances|want to know what lies outside the frame|ask who it was made for}."),
    ("Is there {a shadow|any shadow}?", "{Hardly|Almost none}, {the style is flat|so depth is hard to judge}."),
    ("Does anything {overlap|touch}?", "{Very little|Almost nothing} {overlaps|touches}, {parts keep their distance|which keeps it readable}."),
    ("Is the view {from above|level}?", "{Neither is certain|It is hard to say}, {as there is no perspective|since the ground is flat}."),
    ("Would it {fit|suit} a {magazine|website}?", "{Perhaps a small one|It might}, {beside a short article|on a page for families}."),
    ("How long {would|should} one look at it?", "{A few seconds are|Half a minute is} enough{ to take in the main parts| for most people|}."),
)
REASON_FILLER = (
    ("How {could|might} the {composition|arrangement} be improved?", "{One could|It might help to} {move some parts closer|leave more space on one side|align the larger parts}, though {tastes differ|it works as it is}."),
    ("What can be {inferred|concluded} about the maker of this image?", "{The maker|Whoever made it} {likes clear shapes|values order|had a plain style in mind}, and {wanted to be understood|did not hide anything}."),
    ("Why is there {so much|some} free space?", "Free space {lets the eye rest|separates the parts|makes it simple to count}, which {helps|is useful for} {young viewers|a quick look}."),
    ("What {story|tale} could begin here?", "{A story|One} could begin with {someone coming back|an ordinary morning|a small surprise} and {end where it began|go on for a while}."),
    ("How would {a stranger|somebody new} {describe|understand} it?", "{They would|A stranger would} {name the parts one by one|start with the largest part|speak of the colours first}, then {guess the rest|ask a question}."),
    ("What {questions|thoughts} does the image {raise|leave open}?", "It {leaves open|does not tell} {who was here|what came before|how far things really are}, so {guessing is allowed|one has to imagine it}."),
    ("Is the scene {realistic|believable}?", "{In parts|To some degree}: {the mix makes sense|the style does not|sizes are free}, but {nobody would take it for real|that hardly matters}."),
    ("What {lesson|idea} could a teacher {draw|take} from it?", "A teacher could {ask for directions|practise left and right|compare sizes}, and {the class would count|everybody would take part}."),
    ("Why does the order of things matter?", "{Order guides the eye|The eye follows order}, so {what comes first weighs more|a change would tell another tale}."),
    ("How {reliable|certain} are such {guesses|conclusions}?", "{Only so far|Not very}: {a picture shows a moment|much stays outside the frame}, and {more views would help|caution is wise}."),
    ("What would a {wider|closer} view {show|reveal}?", "{Perhaps more of the same|Maybe more surroundings}, {or nothing new|and a few details}, {but we cannot know|which is only a guess}."),
    ("Why might {opinions|views} about it differ?", "{People bring their own memories|Everyone has seen other places}, so {one sees comfort where another sees clutter|the same part may mean more to some}."),
    ("What {effort|work} went into it?", "{Someone had to choose and place each part|Each part was placed on purpose or by chance}, which {takes patience|is quickly done}."),
    ("How could one {test|check} a claim about it?", "{One would point at the part in question|By pointing at it}, and {if nothing is there the claim fails|the matter is settled}."),
    ("What makes {some parts|one part} easier to {remember|recall}?", "{Size helps|Contrast helps}, {and so does an odd position|but meaning helps even more}, {as many tests have shown|I would say}."),
    ("Would the image {work|read} in black and white?", "{Mostly yes|It would}, {since the shapes are clear|though some charm would go|but telling parts apart takes longer}."),
)
TOPIC = ("{Places and sizes|What is where}", "{Mood and style|The overall impression}", "{Use and purpose|Daily life}", "{A closer look|Details}")
DETAIL_ONE = tuple(("", answer) for answer in (
    "{One can notice|There is|Look closely and there is} a NAME at the HEIGHT SIDE{ of the image|}.",
    "A SIZE NAME {sits|appears|can be found} {near the HEIGHT|on the SIDE side}.",
    "The NAME{, SIZE in size,|} {adds interest|draws a glance|is easy to spot} {on the SIDE|at the HEIGHT}.",
    "{Towards|On} the SIDE{,| side,} a NAME {fills some of the space|takes its place}.",
    "{Also present is|In addition we see} a {SIZE |}NAME.",
))
DETAIL_ACTIVITY = tuple(("", answer) for answer in (
    "{It is a place|One can imagine people here} to DOING.",
    "{Somebody|A visitor} might {come here|stay a while} to DOING.",
))
DETAIL_SETTING = tuple(("", answer) for answer in (
    "The {lighting|light} is {even|soft|bright|gentle}{ across the whole scene|}.",
    "The {background|backdrop} has {two wide areas|an upper and a lower part}{ that meet at a straight line|}.",
    "The {mood|atmosphere} is {friendly|ordinary|relaxed|cheerful}.",
    "{Most people|Many} would {know such a place|feel at ease here}.",
    "The {ground|lower area} is {flat|even} and {of one tone|has hardly any detail}.",
))
DETAIL_TWO = tuple(("", answer) for answer in (
    "The FIRST is RELATION the SECOND{, which gives the picture some depth|}.",
    "{Together with|Next to} the SECOND{, the FIRST makes a pair| one finds the FIRST}.",
    "The SECOND and the FIRST {share the frame|seem to belong together}.",
))
DETAIL_FILLER = tuple(("", answer) for answer in (
    "The image is square{, and its parts are spread over the whole surface|}.",
    "{Colours|Shades} are {bright|clear} and shapes have {soft|clean} edges.",
    "{Nothing|Little} seems out of place.",
    "{A fine grain|Some grain} covers {the surface|everything}{, as in an old photo|}.",
    "The {upper|lower} part is {calmer|simpler} than the {other|rest}.",
    "{Overall|All in all}, the {scene|picture} {is easy to read|makes a tidy impression|needs no explanation}.",
    "{The eye wanders|One's gaze moves} from {side to side|the middle outwards}.",
    "{There is no clear centre|No single part rules the scene}{, so each part counts|}.",
    "{Space is left|There is room} {around most parts|between neighbours}.",
    "{It might be|This could be} {a page of a picture story|a card|a poster}.",
    "{Sizes vary|The scale varies} {a lot|from part to part}{, as in a child's drawing|}.",
    "The frame {cuts nothing off|keeps everything inside}.",
))
